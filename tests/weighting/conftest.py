"""The scripts that made the vectors import packages that the tests do not have."""

collect_ignore_glob = ["vectors/*"]
