"""The emoji FLUX: a small real FLUX.1 (assets, the recipe that made them, dataset, scorer) that everything is proved on."""
