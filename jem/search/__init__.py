"""Hyperparameter search: spaces, what is tried next, how trials are judged, and running them on Ray Tune."""
