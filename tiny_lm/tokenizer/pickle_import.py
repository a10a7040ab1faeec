"""A placeholder until the import is written."""
