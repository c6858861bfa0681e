"""Readers: what people have on disk, as random access to raw documents."""
