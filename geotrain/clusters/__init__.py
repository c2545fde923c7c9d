"""One Dask cluster per region: local, by address, or any Dask cluster class by import path."""

from geotrain.clusters.cluster import ANSWER_S, CLIENT_ERRORS, RegionCluster, open_cluster, quiet_dask

__all__ = ["ANSWER_S", "CLIENT_ERRORS", "RegionCluster", "open_cluster", "quiet_dask"]
