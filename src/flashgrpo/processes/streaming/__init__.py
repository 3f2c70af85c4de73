"""Streaming video, drawn block by block from a cache of keys and values: the parts that a model of it stands on."""
