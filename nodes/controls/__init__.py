"""The control nodes, live values, and the log of what each evaluation used."""
