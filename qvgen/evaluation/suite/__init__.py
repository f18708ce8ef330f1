"""An evaluation: videos of a model beside a reference's, measured by a list of metrics, with intervals."""
