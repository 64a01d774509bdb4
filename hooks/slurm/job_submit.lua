-- wnodes: a courtesy refusal at submission, for site's job_submit.lua. Never the only check: a Lua
-- run-time error lets the job through, so whatever goes wrong here is left to the node to refuse.
local function wnodes_refusal(env)
    for i = 0, 63 do -- Slurm counts this table's keys from 0
        local word = env and env[i]
        if word == nil then break end
        local image = string.match(word, "^VM_IMAGE=(.*)$")
        if image and not string.match(image, "^%w[%w._:@-]*$") then
            return "wnodes: --vm-image '" .. image .. "': want NAME, NAME:TAG or NAME@sha256:DIGEST"
        end
        local start = string.match(word, "^VM_START=(.*)$")
        if start and start ~= "auto" and start ~= "warm" and start ~= "cold" then
            return "wnodes: --vm-start '" .. start .. "': want auto, warm or cold"
        end
        local text = string.match(word, "^VM=(.*)$")
        if text and not string.match(text, "^%l+=") then
            return "wnodes: --vm '" .. text .. "': want KEY=VALUE[,KEY=VALUE...]"
        end
    end
    return nil
end

function slurm_job_submit(job_desc, part_list, submit_uid)
    local ok, refusal = pcall(function() return wnodes_refusal(job_desc.spank_job_env) end)
    if ok and refusal then
        slurm.log_user("%s", refusal)
        return slurm.ERROR
    end
    return slurm.SUCCESS
end

function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
    return slurm.SUCCESS
end

return slurm.SUCCESS
