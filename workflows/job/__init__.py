"""A build as a Ray job: what the cluster needs is uploaded, the job's log is followed.

The client uploads its own `cartridges` and `workflows` packages and the small input files, so that the cluster
runs the same code on the same bytes. Large inputs, and all that the build writes, must lie where the cluster can
reach them.
"""
