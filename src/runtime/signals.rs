//! Signal settings inherited from the parent process.

/// Whether this process ignores `signal`, as `nohup` arranges for SIGHUP.
pub fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: with a null pointer for the new action, sigaction only writes the current one into `action`, which is a
    // plain C struct for which all zeros are valid.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}
