"""The emoji FLUX: a small FLUX.1 on which the project is tested. Its assets, their recipe, its dataset and its scorer."""
