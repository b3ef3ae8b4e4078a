"""What a plan is told by: what binds it, where its time goes, and what a little more of something would give."""
