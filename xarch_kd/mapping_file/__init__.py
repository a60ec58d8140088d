"""Mapping files: schema, reading, plan."""
