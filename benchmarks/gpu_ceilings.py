"""What this card does at best: device copy, bf16 and FP8 products. Other parts give shares of these."""

from gpu_common import Results, bf16_tflop_s, copy_tb_s, fp8_tflop_s

results = Results("ceilings", "Medians of 10 to 20 runs on random data; TB/s counts bytes read and written.")
for row, unit, work in (
    ("device copy", "TB/s", copy_tb_s),
    ("bf16 8192^3", "TFLOP/s", bf16_tflop_s),
    ("FP8 E4M3 8192^3", "TFLOP/s", fp8_tflop_s),
):
    results.measure(row, lambda work=work, unit=unit: {unit: work()}, again=True)
