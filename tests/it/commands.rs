//! Snapshots of the command line: `tests/cmd/*.trycmd` (renew with `TRYCMD=overwrite`).

#[test]
fn snapshots() {
    trycmd::TestCases::new().env("NO_COLOR", "1").case("tests/cmd/*.trycmd");
}
