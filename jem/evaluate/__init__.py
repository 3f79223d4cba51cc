"""How an encoder is judged: kNN, linear probe, collapse diagnostics."""
