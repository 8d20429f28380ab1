"""Several devices: sums of row-sparse gradients (`collectives`), tables split over a mesh (`sharding`)."""
