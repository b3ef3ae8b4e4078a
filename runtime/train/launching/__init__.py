"""The processes around a run: checked before they start, started, met, watched, stopped, and started again."""
