"""Measuring pipelines, and the pictures and the page that show what was measured."""
