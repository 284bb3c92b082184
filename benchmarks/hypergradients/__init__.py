"""Error against time of hypergradients, beside other libraries."""
