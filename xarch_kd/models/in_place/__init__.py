"""Conversion that keeps the teacher's own class and replaces mixers in place."""
