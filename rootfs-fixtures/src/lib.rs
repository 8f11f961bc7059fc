//! rootfs-fixtures
