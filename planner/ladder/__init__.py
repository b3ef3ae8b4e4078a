"""One solve in progress: its candidates, rungs and race, until the proof or the limit."""
