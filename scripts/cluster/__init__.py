"""Several GPUs and machines: configurations, and models that are split over processes."""
