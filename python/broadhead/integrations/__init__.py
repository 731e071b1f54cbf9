"""Adapters that plug broadhead into other libraries; each is imported only when asked for."""
