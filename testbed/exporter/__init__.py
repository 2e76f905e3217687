"""Live state and results as Prometheus metrics.  For watching only: nothing is ever computed from Prometheus.

    metrics = RunMetrics()                           # a Watcher; `Tee` tells it beside the terminal
    with serve(metrics.registry(), "9101"):          # http://127.0.0.1:9101/metrics, found by `testbed dashboards`
        …

`testbed exporter` serves the results of all runs and the devices of an inventory in the same way.  Every series is of a
family in `families`, which the documentation and the dashboards are held to.  What is not known has no series; it is
never 0.
"""
