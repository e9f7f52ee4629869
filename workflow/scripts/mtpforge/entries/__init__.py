"""Entries of models that `make add`, `make quant` and `make inject` write into config.d."""
