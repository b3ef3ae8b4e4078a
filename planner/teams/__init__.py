"""Teams: a plan rank as several devices, with tensor, sequence, context, expert and data parallelism around it."""
