"""Data set format, ingest, decoding, and the stream."""
