"""Measurements on calibration text: layer similarity, closed-form initialization, projector report."""
