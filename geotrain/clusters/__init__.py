"""One Dask cluster per region: local, by address, or any Dask cluster class by import path."""

from geotrain.clusters.cluster import CLIENT_ERRORS, RegionCluster, open_cluster, quiet_dask

__all__ = ["CLIENT_ERRORS", "RegionCluster", "open_cluster", "quiet_dask"]
