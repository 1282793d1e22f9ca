//! An allocator that counts the bytes of the whole process: who asks for them runs alone in a process of its own.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;
/// Bytes that are allocated now.
pub static LIVE: AtomicUsize = AtomicUsize::new(0);
/// The most that were, since somebody set it.
pub static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator; the counters touch no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(memory.size(), Relaxed) + memory.size(), Relaxed);
        // SAFETY: passed on.
        let start = unsafe { System.alloc(memory) };
        if start.is_null() {
            LIVE.fetch_sub(memory.size(), Relaxed);
        }
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, memory: Layout) {
        LIVE.fetch_sub(memory.size(), Relaxed);
        // SAFETY: passed on.
        unsafe { System.dealloc(start, memory) }
    }
}
