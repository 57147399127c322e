"""transformers with our packed linears: nothing here is active before :func:`dq_runtime.use_packed_linears`."""
