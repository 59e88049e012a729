"""The network: tensors in, tensors out (imports ``data`` and ``retrieval``)."""
