"""Pretrain one transformer that reads, writes, sees and draws (Transfusion, arXiv 2408.11039)."""

__version__ = "0.1.0"
