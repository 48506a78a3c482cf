"""Versioned documents with compare-and-set, prefix reads and watch. Imports base."""
