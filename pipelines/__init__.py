"""The jobs, one file each, and the `jem` command."""
