"""Language models: loading, architectures, what a forward pass says, adapters, quantisation, export."""
