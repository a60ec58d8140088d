"""The language of mapping files: YAML to checked objects with positions, without torch."""
