//! The only integration test binary; each further one would link candle again.

mod bench;
mod commands;
mod counting;
mod docs;
mod end_to_end;
mod end_to_end_parity;
mod eval_t2i;
mod faults;
mod fid;
mod file_systems;
mod filter;
mod finetune;
mod fuzz;
mod generate;
mod house;
mod human;
mod imports;
mod large_data;
mod lora_parity;
mod markdown;
mod matcher;
mod matcher_data;
mod memory;
mod one_cpu;
mod plan;
mod ranks;
mod ranks_tcp;
#[cfg(feature = "remote")]
mod remote;
mod report;
mod t2i;
mod tokenizer;
mod train;
mod transformer_parity;
mod translate;
mod words;
