"""The challenge's protocol (report section 2.3): PSNR, run time, memory, complexity and scores of the networks."""
