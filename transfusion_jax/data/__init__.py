"""From sources of documents to packed rows."""
