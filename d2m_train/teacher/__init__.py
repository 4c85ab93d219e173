"""The frozen teacher: a dense FLUX.1, with LoRAs, quantised or offloaded."""
