//! QEMU's queries: the structures of its qapi/block-core.json, with the voted disk as QEMU's quorum
//! node and each replica as a file node below it. A count that this daemon does not have is 0.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::control::state::{DiskState, Operations, ReplicaState};

/// BlockInfo.
#[derive(Debug, Serialize)]
pub(super) struct BlockInfo {
    device: String,
    r#type: &'static str,
    removable: bool,
    locked: bool,
    inserted: BlockDeviceInfo,
}

/// BlockDeviceInfo.
#[derive(Debug, Serialize)]
pub(super) struct BlockDeviceInfo {
    file: String,
    #[serde(rename = "node-name")]
    node_name: String,
    ro: bool,
    drv: &'static str,
    backing_file_depth: u64,
    encrypted: bool,
    detect_zeroes: &'static str,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    image: ImageInfo,
    cache: CacheInfo,
    write_threshold: u64,
}

/// ImageInfo.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    filename: String,
    format: &'static str,
    virtual_size: u64,
}

/// BlockdevCacheInfo.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct CacheInfo {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

/// The arguments of query-named-block-nodes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryNamedBlockNodes {
    /// Leaves out backing images, of which there are none.
    #[serde(default, rename = "flat")]
    _flat: bool,
}

/// The arguments of query-blockstats.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct QueryBlockstats {
    #[serde(default)]
    query_nodes: bool,
}

/// BlockStats.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockStats {
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    node_name: String,
    stats: DeviceStats,
}

/// BlockDeviceStats.
#[derive(Debug, Default, Serialize)]
struct DeviceStats {
    rd_bytes: u64,
    wr_bytes: u64,
    zone_append_bytes: u64,
    unmap_bytes: u64,
    rd_operations: u64,
    wr_operations: u64,
    zone_append_operations: u64,
    flush_operations: u64,
    unmap_operations: u64,
    rd_total_time_ns: u64,
    wr_total_time_ns: u64,
    zone_append_total_time_ns: u64,
    flush_total_time_ns: u64,
    unmap_total_time_ns: u64,
    wr_highest_offset: u64,
    rd_merged: u64,
    wr_merged: u64,
    zone_append_merged: u64,
    unmap_merged: u64,
    failed_rd_operations: u64,
    failed_wr_operations: u64,
    failed_zone_append_operations: u64,
    failed_flush_operations: u64,
    failed_unmap_operations: u64,
    invalid_rd_operations: u64,
    invalid_wr_operations: u64,
    invalid_zone_append_operations: u64,
    invalid_flush_operations: u64,
    invalid_unmap_operations: u64,
    account_invalid: bool,
    account_failed: bool,
    timed_stats: [(); 0],
}

/// query-block.
pub(super) fn devices(disk: &DiskState) -> Vec<BlockInfo> {
    vec![BlockInfo {
        device: disk.node_name.clone(),
        r#type: "unknown",
        removable: false,
        locked: false,
        inserted: voted_node(disk),
    }]
}

/// query-named-block-nodes.
pub(super) fn nodes(disk: &DiskState) -> Vec<BlockDeviceInfo> {
    let replicas = disk.replicas.iter().map(|replica| file_node(disk, replica));
    std::iter::once(voted_node(disk)).chain(replicas).collect()
}

/// query-blockstats.
pub(super) fn statistics(disk: &DiskState, query: &QueryBlockstats) -> Vec<BlockStats> {
    let device = |name: &String| (!query.query_nodes).then(|| name.clone());
    let mut all = vec![BlockStats {
        device: device(&disk.node_name),
        node_name: disk.node_name.clone(),
        stats: voted_statistics(disk),
    }];
    if query.query_nodes {
        all.extend(disk.replicas.iter().map(|replica| BlockStats {
            device: None,
            node_name: replica.node_name.clone(),
            stats: file_statistics(replica),
        }));
    }
    all
}

fn voted_node(disk: &DiskState) -> BlockDeviceInfo {
    let children = disk.replicas.iter();
    let children: Vec<_> = children
        .map(|replica| json!({ "driver": driver_of(replica), "filename": replica.file }))
        .collect();
    let options = json!({
        "children": children,
        "driver": "quorum",
        "vote-threshold": disk.policy.vote_threshold,
    });
    node(
        disk,
        disk.node_name.clone(),
        "quorum",
        format!("json:{options}"),
        disk.direct,
    )
}

fn file_node(disk: &DiskState, replica: &ReplicaState) -> BlockDeviceInfo {
    node(
        disk,
        replica.node_name.clone(),
        driver_of(replica),
        replica.file.clone(),
        replica.direct_io,
    )
}

fn driver_of(replica: &ReplicaState) -> &'static str {
    if replica.is_block_device {
        "host_device"
    } else {
        "file"
    }
}

fn node(
    disk: &DiskState,
    node_name: String,
    driver: &'static str,
    file: String,
    direct: bool,
) -> BlockDeviceInfo {
    BlockDeviceInfo {
        node_name,
        ro: disk.read_only,
        drv: driver,
        backing_file_depth: 0,
        encrypted: false,
        detect_zeroes: "off",
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image: ImageInfo {
            filename: file.clone(),
            format: driver,
            virtual_size: disk.size,
        },
        cache: CacheInfo {
            writeback: true,
            direct,
            no_flush: false,
        },
        write_threshold: 0,
        file,
    }
}

fn voted_statistics(disk: &DiskState) -> DeviceStats {
    let requests = &disk.requests;
    DeviceStats {
        unmap_bytes: requests.zero.bytes,
        unmap_operations: requests.zero.completed,
        unmap_total_time_ns: requests.zero.latency.sum_ns(),
        failed_unmap_operations: requests.zero.failed,
        wr_highest_offset: requests.written_to_byte,
        ..figures(&requests.read, &requests.write, &requests.flush)
    }
}

fn file_statistics(replica: &ReplicaState) -> DeviceStats {
    let operations = &replica.operations;
    figures(&operations.read, &operations.write, &operations.flush)
}

fn figures(read: &Operations, write: &Operations, flush: &Operations) -> DeviceStats {
    DeviceStats {
        rd_bytes: read.bytes,
        wr_bytes: write.bytes,
        rd_operations: read.completed,
        wr_operations: write.completed,
        flush_operations: flush.completed,
        rd_total_time_ns: read.latency.sum_ns(),
        wr_total_time_ns: write.latency.sum_ns(),
        flush_total_time_ns: flush.latency.sum_ns(),
        failed_rd_operations: read.failed,
        failed_wr_operations: write.failed,
        failed_flush_operations: flush.failed,
        ..DeviceStats::default()
    }
}
