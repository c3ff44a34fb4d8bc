"""Numbers in few bits: packing, group quantisers, block floating point, and the ledger of bytes really held."""
