"""The commands of `python -m d2m_train`: each module has `add_arguments` and `run`."""
