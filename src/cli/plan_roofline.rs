//! The table of `vilg plan --roofline`.

use crate::{
    report,
    train::roofline::{Roofline, Share},
};

/// Prints the time of a step with stock ops and with fused kernels, by kind of op.
pub fn print(rooflines: &[Roofline]) {
    report::result(
        "\nroofline: the least time of a step of one GPU, from the FLOPs and bytes of each op; no GPU has confirmed it yet",
    );
    for roofline in rooflines {
        let Roofline { kernels, compute_seconds, network_seconds, host_seconds, seconds, mfu, .. } = roofline;
        report::result(format_args!(
            "\n--kernels {kernels}: {seconds:.2} s, MFU {:.1} % (ops {compute_seconds:.2} s, network {network_seconds:.2} s beside \
            them, host {host_seconds:.2} s)",
            100.0 * mfu
        ));
        let row = |(name, share): &(&str, Share)| {
            let Share { seconds, tflops, gigabytes, launches } = share;
            let percent = 100.0 * seconds / compute_seconds;
            [
                (*name).to_owned(),
                format!("{seconds:.2}"),
                format!("{percent:.0} %"),
                format!("{tflops:.0}"),
                format!("{gigabytes:.0}"),
                format!("{launches:.0}"),
            ]
            .to_vec()
        };
        let rows: Vec<Vec<String>> = roofline.ops.iter().map(row).collect();
        report::table(&["  op", "seconds", "share", "TFLOP", "GB", "launches"], &rows);
    }
}
