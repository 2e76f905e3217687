"""The methods that come with the testbed: one file each, found by name; what several share is in files with a `_`."""
