"""The arithmetic of every merge method, as functions of tensors, and the table that names them."""
