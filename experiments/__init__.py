"""Models, data and studies for quantjax; registered by entry points."""
