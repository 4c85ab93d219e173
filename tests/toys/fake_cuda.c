/* A CUDA runtime and driver that do nothing: torch believes in two GPUs. Memory is the host's; copies happen, kernels do
   not. Preloaded as libcuda.so.1 (see gpu_programs.py). It shows devices, streams and backward passes, never values. */
#include <driver_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GPUS 2
#define MEMORY ((size_t)80 << 30)
#define DONE(name) int name() { return 0; }

static __thread int current = 0;

int cudaGetDeviceCount(int *count) { *count = GPUS; return 0; }
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaSetDevice(int device) { current = device; return 0; }
int cudaDriverGetVersion(int *version) { *version = CUDA; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = CUDA; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = MEMORY; return 0; }

/* An H100's, as far as torch asks. */
int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
    return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "GPU without hardware %d", device);
    properties->totalGlobalMem = MEMORY;
    properties->major = 9;
    properties->multiProcessorCount = 132;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = 227 << 10;
    properties->maxGridSize[0] = properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = properties->maxThreadsDim[2] = 64;
    return 0;
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    return 0;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 1; return 0; }

/* Memory */
static int allocate(void **pointer, size_t size) { *pointer = aligned_alloc(512, (size + 511) / 512 * 512); return 0; }
int cudaMalloc(void **pointer, size_t size) { return allocate(pointer, size); }
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return allocate(pointer, size); }
int cudaFree(void *pointer) { free(pointer); return 0; }
int cudaFreeHost(void *pointer) { free(pointer); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size) { memcpy(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { memcpy(to, from, size); return 0; }
int cudaMemcpyPeerAsync(void *to, int device, const void *from, int peer, size_t size) { memcpy(to, from, size); return 0; }
int cudaMemset(void *at, int value, size_t size) { memset(at, value, size); return 0; }
int cudaMemsetAsync(void *at, int value, size_t size) { memset(at, value, size); return 0; }
DONE(cudaHostRegister) DONE(cudaHostUnregister)

/* Streams, events and kernels: everything is finished when it is asked for. */
int cudaStreamCreateWithPriority(void **stream) { *stream = malloc(1); return 0; }
int cudaEventCreateWithFlags(void **event) { *event = malloc(1); return 0; }
int cudaEventDestroy(void *event) { free(event); return 0; }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return 0; }
DONE(cudaStreamSynchronize) DONE(cudaStreamQuery) DONE(cudaStreamWaitEvent) DONE(cudaEventRecord)
DONE(cudaEventRecordWithFlags) DONE(cudaEventQuery) DONE(cudaEventSynchronize) DONE(cudaDeviceSynchronize)
DONE(cudaThreadExchangeStreamCaptureMode) DONE(cudaLaunchKernel) DONE(cudaLaunchKernelExC) DONE(cudaFuncSetAttribute)
DONE(cudaGetLastError) DONE(cudaPeekAtLastError)

/* The driver */
int cuDriverGetVersion(int *version) { *version = CUDA; return 0; }
int cuDeviceGetCount(int *count) { *count = GPUS; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
DONE(cuInit) DONE(cuCtxSetCurrent)
