"""Which device holds which experts of a MoE model, with bounds, and what moving them costs."""
