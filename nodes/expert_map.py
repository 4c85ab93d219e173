"""The expert map: FLUX-MoE Expert Map, and what its widget gets.

ui = {"d2m_map": [{"traces": [id, …], "images": [{"filename", "subfolder", "type"} | None, …], "batches": [[…], …]}]}

- `traces`: one id, or two where `compare` is connected. GET /d2m/traces/{id} describes one (trace_routes.py).
- `images`: of each trace the first image (temporary file, without overlay), None where no image is connected.
- `batches`: of each trace all images of its batch; sample["image"] of the trace's description is the index.

Beyond the description that was agreed on: samples have "prompt" (which of several combined prompts) and "image" (index
in the batch), steps' samples have "evaluated" (false: this sample was not evaluated in this step), and there is "notes",
a list of texts for the user. "cond" may be another word than positive and negative: the guider's own. Where prompts or
references differ in length, every sample is filled up to the longest with tokens that have no expert (255, margin 0), so
that text_tokens and reference_tokens hold for all. "slots" is at least 1. Of "prompt" single samples may be null. T*K is
token by token: experts[token * K + slot].
"""
