//! The one integration binary (each further one would link candle again).

mod commands;
mod house;
mod train;
mod transformer_parity;
mod tokenizer;
